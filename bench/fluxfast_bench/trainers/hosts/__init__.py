"""How each trainer makes its model and puts its adapters on it, a module each.

`CASES` has, by what is trained, a function from a shape to a `case.Case`. A trainer's code is
imported when a case is made, from the folder that was given for it.
"""
