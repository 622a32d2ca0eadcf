"""Errors of the search_spaces package, one root, few leaves."""


class SearchSpaceError(Exception):
    """A choice, candidate or space is not valid; the message says what is allowed."""


class InvalidChoice(SearchSpaceError):
    """A precision, ratio or runtime option is not one that exists or that the space offers."""


class InvalidCandidate(SearchSpaceError):
    """A candidate names a group that the space does not have, or is not readable as JSON."""
