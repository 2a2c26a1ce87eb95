"""The attention core (`attention`, `backbone`) and the training glue (`training`)."""
