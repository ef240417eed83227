"""What techniques cost and save on a model of any size: one file of formulas each.

A file here has the name of a technique and a function ``cost(shape, *, option=default, ...)``,
which gives an object with ``as_dict()`` and a text (``str``). ``ENCODERS = True`` in the file says
that its formulas know models with an encoder. Being here makes it a word of ``minitx cost``.
"""
