"""Models in formats that others read: `dqx export FORMAT SOURCE --out PATH` (README.md)."""
