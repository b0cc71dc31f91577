"""What operators and observers may ask: one module per subject, with its handlers and `ROUTES`.

Imported by `api.app` alone.
"""
