"""The applications, a folder each; `core.training.app` finds them."""
