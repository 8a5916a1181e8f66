"""The lessons, described once a build: to describe one, its script is parsed."""

import re

import course


def lessons(app):
    """All lessons, in reading order."""
    if not hasattr(app, "described_lessons"):
        app.described_lessons = course.lessons(app)
    return app.described_lessons


def plain(text, found):
    """A lesson's words without markup: labels of lessons become their titles."""
    titles = {lesson.label: lesson.title for lesson in found}
    text = re.sub(r":ref:`([^`<>]+)`", lambda label: titles.get(label[1], label[1]), text)
    text = re.sub(r":\w+:`([^`<]+?)(?: <[^`]*>)?`|`([^`<]+?) <[^`]*>`__?", r"\1\2", text)
    return re.sub(r"``([^`]+)``|`([^`]+)`", r"\1\2", text)
