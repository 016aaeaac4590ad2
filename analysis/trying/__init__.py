"""A model to try: choose its experts, write to it, and see which of them answer."""

from .session import Answer, ExpertChoice, Session, Step, Switch

__all__ = ["Answer", "ExpertChoice", "Session", "Step", "Switch"]
