"""What a tab says about itself: what it answers, what went wrong, and from which choices its result was made.

A notice stays beside the controls until the next success. A line over the result names what it was made from; once the
choices differ from these, or an upload failed, the line says that the result is an earlier one and the page pales it.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from html import escape
from typing import Any

import gradio as gr

from veena_lens.app.explorer.state import Explorer, Session, Shown, report_errors
from veena_lens.app.explorer.words import SeveralTokens

# The browser refuses some files itself (too large, cut off) and says so in a message that goes; the notice keeps it.
NOTICE = """
const box = element.querySelector('.veena-notice');
const close = document.createElement('button');
close.type = 'button'; close.textContent = 'Close'; close.className = 'veena-close';
const say = (text) => {
  box.replaceChildren();
  box.hidden = !text;
  if (text) box.append(Object.assign(document.createElement('span'), { textContent: text }), close);
};
close.addEventListener('click', () => say(''));
const show = () => say(props.value ? JSON.parse(props.value).text : '');
watch('value', show);
show();
const isSeen = () => element.closest('[role=tabpanel]')?.checkVisibility() ?? true;
window.addEventListener('veena-refused', (event) => {
  if (!isSeen() || event.detail === box.textContent.replace(/Close$/, '')) return;
  say(event.detail);
  const old = element.closest('[role=tabpanel]')?.querySelector('.veena-of');
  // Of its own errors the server says itself what they leave of the result.
  if (!old || !/upload|maximum|exceeds/i.test(event.detail)) return;
  old.classList.add('veena-old');
  old.textContent = 'Still the earlier result. ' + old.textContent;
});
"""
# Run once, when the page loads.
LISTEN = """() => {
  document.body.classList.remove('dark'); document.documentElement.classList.remove('dark');
  const seen = new WeakSet();
  new MutationObserver(() => {
    for (const body of document.querySelectorAll('.toast-body.error')) {
      if (seen.has(body)) continue;
      seen.add(body);
      const text = (body.querySelector('.toast-message-text, .toast-text') ?? body).textContent.trim();
      window.dispatchEvent(new CustomEvent('veena-refused', { detail: text }));
    }
  }).observe(document.body, { childList: true, subtree: true });
}"""
FAILED = ("failed",)
RENEW = "The choices above have changed since"


def plain(values: Sequence[Any]) -> tuple[Any, ...]:
    """Return the values of components so that equal choices compare equal: nothing is nothing, 1.0 is 1."""
    return tuple(tuple(v) if isinstance(v, list) and v else (v or None) for v in values)


class Status:
    """The notice and the line of origin of one tab, and the events that keep them true."""

    def __init__(self, explorer: Explorer, name: str, tab: Any = None, also: Callable[[Session], Any] | None = None):
        """Serve the tab `name`. tab: its component, looked at when it is chosen. also: what else its result depends
        on, such as the question of another tab."""
        self.explorer, self.name, self.tab = explorer, name, tab
        self.also = also or (lambda session: None)
        self.parent = self
        self.notice: Any = None
        self.offers: Any = None
        # Made now, so that events can name it, and placed over the result later.
        self.of: Any = gr.HTML("", elem_id=f"{name}-of", apply_default_css=False, render=False)

    def part(self, name: str) -> Status:
        """Return the status of a group of controls that has its own notice and the tab's result."""
        made = Status(self.explorer, f"{self.name}-{name}", self.tab)
        made.parent, made.of = self, self.of
        return made

    # --- components -----------------------------------------------------------------------------------
    def place_notice(self, words: Sequence[Any] = ()) -> None:
        """Place the notice here, beside the controls; `words`: boxes in which a word may be replaced by a token."""
        template = '<div class="veena-notice" role="alert" hidden></div>'
        name = f"{self.name}-notice"
        self.notice = gr.HTML("", html_template=template, js_on_load=NOTICE, elem_id=name, apply_default_css=False)
        self.offers = gr.Radio([], label="Tokens", visible=False, elem_id=f"{self.name}-offers")

        def taken(request: gr.Request, token: str | None, *texts: str) -> tuple[Any, ...]:
            found = self.explorer.session(request.session_hash).offers.get(self.name)
            if found is None or not token:
                return (gr.skip(),) * (1 + len(texts))
            whole = re.compile(rf"(?<![^\s,]){re.escape(found.word)}(?![^\s,])")
            return gr.update(visible=False, choices=[], value=None), *(whole.sub(token, text) for text in texts)

        if words:
            quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
            self.offers.input(report_errors(taken), [self.offers, *words], [self.offers, *words], **quiet)

    def place_origin(self, text: str = "") -> None:
        """Place the line of origin here, over the result; `text`: what it says before the first one."""
        self.of.value = f'<p class="veena-of">{escape(text)}</p>' if text else ""
        self.of.render()

    # --- events ---------------------------------------------------------------------------------------
    def listen(
        self,
        triggers: Sequence[Any],
        handler: Callable[..., Any],
        inputs: Any,
        outputs: Any,
        clears: Sequence[Any] = (),
        keeps: bool = False,
        **settings: Any,
    ) -> Any:
        """Run a handler when one of the triggers fires; afterwards notice and origin are true again.

        clears: components of text that are emptied after a failure. keeps: a failure leaves the result what it was."""
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        event = gr.on(
            triggers, self.recorded(handler, keeps), inputs, outputs, **{"api_visibility": "private", **settings}
        )

        def after(request: gr.Request) -> tuple[Any, ...]:
            session = self.explorer.session(request.session_hash)
            failed = bool(session.notices.get(self.name))
            emptied = (("" if failed else gr.skip()) for _ in clears)
            return self.notice_value(session), self.offered(session), self.parent.line(session), *emptied

        # The page runs what follows by .then() after a success alone.
        for ended in (event.success, event.failure):
            ended(after, None, [self.notice, self.offers, self.of, *clears], **quiet)
        return event

    def watch(self, components: Sequence[Any]) -> None:
        """Compare the choices with those of the result whenever one of them changes, or the tab is opened."""

        @report_errors
        def changed(request: gr.Request, *values: Any) -> Any:
            session = self.explorer.session(request.session_hash)
            for component, value in zip(components, values, strict=True):
                if isinstance(component, gr.File):
                    self.explorer.own(session, value)
            before = self.line(session)
            session.chosen[self.name] = plain(values)
            after = self.line(session)
            return gr.skip() if before == after and not self.also(session) else after

        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "trigger_mode": "always_last"}
        opened = [] if self.tab is None else [self.tab.select]
        gr.on([*(c.change for c in components), *opened], changed, list(components), self.of, **quiet)

    def recorded(self, handler: Callable[..., Any], keeps: bool = False) -> Callable[..., Any]:
        """Return a handler of which the session knows how it ended."""

        @contextmanager
        def recording(given: Sequence[Any]) -> Iterator[None]:
            request = next(one for one in given if isinstance(one, gr.Request))
            session = self.explorer.session(request.session_hash)
            session.notices.pop(self.name, None)
            session.offers.pop(self.name, None)
            try:
                yield
            except gr.Error as error:
                session.notices[self.name] = str(error.message)
                if not keeps:
                    session.chosen[self.parent.name] = FAILED
                if isinstance(error.__cause__, SeveralTokens):
                    session.offers[self.name] = error.__cause__
                raise

        @wraps(handler)
        def steps(*args: Any) -> Any:
            with recording(args):
                yield from handler(*args)

        @wraps(handler)
        def call(*args: Any) -> Any:
            with recording(args):
                return handler(*args)

        return steps if inspect.isgeneratorfunction(handler) else call

    # --- what is said ---------------------------------------------------------------------------------
    def begins(self, session: Session) -> None:
        """Forget the choices that were compared last: a new result is on its way, and those since then count."""
        session.chosen.pop(self.name, None)

    def shows(self, session: Session, values: Sequence[Any] | None, text: str) -> None:
        """Keep what the result that is shown now was made from, and how to call it.

        values: of the watched components, in their order; None for a result that is not theirs."""
        key = None if values is None else plain(values)
        session.shown[self.name] = Shown(key, self.also(session), text)
        if key is None:
            session.chosen[self.name] = None
        else:
            session.chosen.setdefault(self.name, key)

    def line(self, session: Session) -> Any:
        """Return the line of origin; nothing before the first result."""
        shown = session.shown.get(self.name)
        if shown is None:
            return gr.skip()
        if session.chosen.get(self.name, shown.key) == shown.key and self.also(session) == shown.also:
            return f'<p class="veena-of">Shown: {escape(shown.text)}.</p>'
        why = "What was tried last failed" if session.notices.get(self.name) else RENEW
        return f'<p class="veena-of veena-old">{why}: below is still the earlier result, {escape(shown.text)}.</p>'

    def offered(self, session: Session) -> Any:
        """Return the tokens of a word that is not one token, to choose from."""
        found = session.offers.get(self.name)
        if found is None:
            return gr.update(visible=False, choices=[], value=None)
        choices = [(f"“{text}” (#{token})", f"#{token}") for token, text in dict(found.pieces).items()]
        return gr.update(visible=True, choices=choices, value=None, label=f"Tokens of “{found.word}”")

    def notice_value(self, session: Session) -> str:
        """Return the notice with a number, so that one that comes again is announced again."""
        session.n_notices += 1
        return json.dumps({"n": session.n_notices, "text": session.notices.get(self.name, "")})
