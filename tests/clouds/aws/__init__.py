"""AWS in a box: moto's server, with machines behind its EC2, and faults, prices, and metadata that moto lacks."""

from tests.clouds.aws.cloud import AwsCloud
from tests.clouds.aws.faults import Faults

__all__ = ["AwsCloud", "Faults"]
