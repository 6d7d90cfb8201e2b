"""The configuration: what every key means, and how the command line and `conf/` become one."""
