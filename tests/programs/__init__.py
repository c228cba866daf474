"""Programs that tests start in processes of their own, on simulated devices or as one of many.

What they print is compared by the tests that start them.
"""
