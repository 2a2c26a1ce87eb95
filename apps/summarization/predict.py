"""Later."""


def predict(run, input, output):
    """Later."""
