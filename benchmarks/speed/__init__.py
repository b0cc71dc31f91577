"""The benchmark: commonweight beside stock Flower and beside what wire and memory allow.

python -m benchmarks.speed           quick: three cases, below three minutes
python -m benchmarks.speed --full    all cases, load clients, idle figures; about 20 minutes
"""
