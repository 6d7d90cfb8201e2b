"""What everything else stands on and that knows nothing of models: files, digests, devices, processes, names, parts."""
