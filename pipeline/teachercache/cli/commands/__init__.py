"""The commands, a file each. Each function parses, calls one function of the package, and prints what that returns.

    jobs/       commands that compute: caches, students, and what both are worth
    caches/     commands about caches that are there

Heavy libraries are imported inside the functions: `teachercache --help` answers at once.
"""
