"""Speed, as ratios: each row times our code and a yardstick in turn and prints what one costs in the other."""
