"""The shipped models, one folder each. (A package only so that an installed minitx finds them.)"""
