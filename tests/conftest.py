"""What every test runs under: the same property-test settings everywhere, and no process or mount left behind."""

from hypothesis import HealthCheck, settings

settings.register_profile("replfs", deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("replfs")

pytest_plugins = ["harness"]
