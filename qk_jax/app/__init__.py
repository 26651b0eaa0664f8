"""The local app: a web page to paint with, and the REST interface that it uses.

One thread paints, a job after the other; the server reads what comes in, and tells how far it is.
What is uploaded and painted is held in memory only: nothing is written to disk.
"""
