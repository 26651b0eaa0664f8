"""The role of a condition picture."""

SOURCE = 0  # the picture to edit
REFERENCE = 1  # a picture of a subject that is to appear
