"""The study of a pair: rivals, thresholds, where the models agree, and reports of it."""
