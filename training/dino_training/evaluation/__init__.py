"""Evaluation: how good a backbone is, by the protocols that papers report.

Each protocol is a module with one function that runs it; `metrics` and `bootstrap` hold the formulas. Import the
module that is needed: nothing is loaded here.
"""
