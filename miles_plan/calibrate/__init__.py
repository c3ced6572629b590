"""Measures the machine it runs on and writes a hardware profile that the cost models use: `miles-plan calibrate`."""
