"""Cost formulas, one file per technique: what it saves and costs on a model of any size.

A file has the name of a technique and a function ``cost(shape, *, option=default, ...)`` that
returns an object with ``as_dict()`` and ``str``. ``ENCODERS = True`` in the file says that its
formulas cover models with an encoder. Being here makes it available to ``minitx cost``.
"""
