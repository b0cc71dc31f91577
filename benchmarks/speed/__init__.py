"""The benchmark: commonweight compared with stock Flower and with the physical floor.

python -m benchmarks.speed           quick: three cases, less than three minutes
python -m benchmarks.speed --full    all cases, load clients, idle figures; about 20 minutes
"""
