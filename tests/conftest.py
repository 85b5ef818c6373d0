"""What holds for every test: generated examples are the same in every run, however slow the machine is.

``pytest --hypothesis-profile=default`` looks for new ones.
"""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "same", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")
