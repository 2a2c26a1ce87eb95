"""One file per family of mechanisms; each opens with its definition, `reference`. A new file here is a new variant."""
