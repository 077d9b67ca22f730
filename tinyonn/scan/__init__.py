"""Digital fMRI: corpus, engine, runner."""
