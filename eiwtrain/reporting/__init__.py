"""Pages about runs that a person can send: `facts` gathers, `charts` draws, `page` shows a run, `comparison` several.

Everything that was recorded may have been written by somebody else: it is shown, and never opened as code.
"""
