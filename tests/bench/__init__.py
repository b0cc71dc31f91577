"""The benchmark: commonweight beside stock Flower and beside what wire and memory allow.

python -m tests.bench           quick: three cases, below three minutes
python -m tests.bench --full    all cases, load clients, idle figures; about 20 minutes
"""
