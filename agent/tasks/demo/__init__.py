"""Small built-in tasks for demonstrations and tests. Only the registry names them."""
