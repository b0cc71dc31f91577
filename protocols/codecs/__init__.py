"""Codecs: how an update is compressed. Pure. Imports `model` and the layers below it."""
