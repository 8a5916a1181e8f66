"""The lessons, described once a build: to describe one, its script is parsed."""

import course


def lessons(app):
    """All lessons, in reading order."""
    if not hasattr(app, "described_lessons"):
        app.described_lessons = course.lessons(app)
    return app.described_lessons
