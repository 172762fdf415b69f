"""What the commands do beside making pictures: calibrate, measure, verify, inspect, plot."""
