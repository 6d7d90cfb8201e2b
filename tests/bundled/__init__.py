"""How what comes with dqx was made: the nano models and their data, the sizes of benchmarks that plans assume."""
