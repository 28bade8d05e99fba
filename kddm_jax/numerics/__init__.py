"""The parts that distances are made of: checks, linear algebra, classes, transport."""
