"""The live dashboard: web pages that show sweeps while they run, and afterwards."""
