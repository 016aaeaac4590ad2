"""One page that shows what the experts learned: it opens in a browser, and needs nothing beside it."""

from .content import Shown, page_content
from .html import write_page
from .pictures import write_pictures

__all__ = ["Shown", "page_content", "write_page", "write_pictures"]
