"""Merge methods: functions on blocks of numbers, and the table of properties that recipe and plan use."""
