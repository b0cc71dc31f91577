"""The handlers of the HTTP routes, one module for each subject.

Imported by `api.app` alone.
"""
