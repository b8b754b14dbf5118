"""Tests of self-written text."""
