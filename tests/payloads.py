"""Payloads that no pipeline should get, and every one does."""


class Hostile:
    def __str__(self):
        raise RuntimeError("no")

    __repr__ = __str__


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"in": value}
    return value


def cycle(width):
    members = []
    members.extend([members] * width)
    return {"self": members}
