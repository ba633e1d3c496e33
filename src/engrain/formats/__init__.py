"""Records that others wrote, and the `Trajectory` they mean: one module a format.

A reader takes a `Node` (a record that knows where it stands) and returns a trajectory or raises `DataError`; a writer
takes a trajectory and returns a plain object. What a format cannot hold is named in its module's docstring.
"""
