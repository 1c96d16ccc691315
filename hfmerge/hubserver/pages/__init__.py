"""Pages for people: what the repositories hold, as HTML made on the server, without scripts, cookies or a build.

Everything a page shows was written by somebody: names, messages, cards, ledgers. All of it goes through one
environment of templates (`rendering`), which escapes it, or through one renderer of Markdown (`markdown`), which knows
no raw HTML. The policy that is sent along forbids scripts, frames and foreign addresses in case both should fail.
"""

from hfmerge.hubserver.pages.commits import ROUTES as _COMMITS
from hfmerge.hubserver.pages.files import ROUTES as _FILES
from hfmerge.hubserver.pages.lists import ROUTES as _LISTS
from hfmerge.hubserver.pages.rendering import fault_page
from hfmerge.hubserver.pages.talks import ROUTES as _TALKS


__all__ = ["ROUTES", "fault_page"]

# The shortest addresses last: a namespace must not be taken for a list, nor a repository for a file.
ROUTES = [*_COMMITS, *_TALKS, *_FILES, *_LISTS]
