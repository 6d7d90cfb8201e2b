"""What Hydra loads by itself: our sweeper, and the launchers behind `conf/hydra/launcher`."""
