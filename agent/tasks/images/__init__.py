"""The built-in task `images`: folders of pictures, for PyTorch and for Keras.

Only the registry names its tasks.
"""
