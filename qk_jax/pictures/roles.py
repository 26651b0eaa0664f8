"""What a condition picture is to the model."""

SOURCE = 0  # the picture to edit
REFERENCE = 1  # a picture of a subject that is to appear
