"""Stand-in: upstream's generation tests are not in the source distribution."""


class GenerationTesterMixin:
    """A base that every tester of a generating model must have; it adds no tests."""
