"""The declarative base and the column types shared by all tables."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar

from sqlalchemy import JSON, BigInteger, Double, Enum, Identity, Integer, MetaData, String
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, mapped_column

from persyn.db.time import UtcDateTime, now

_BigInt = BigInteger().with_variant(Integer, "sqlite")
Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")

Id = Annotated[int, mapped_column(_BigInt, Identity(), primary_key=True)]
Big = Annotated[int, mapped_column(_BigInt)]
UtcTime = Annotated[datetime, mapped_column(UtcDateTime)]
CreatedAt = Annotated[datetime, mapped_column(UtcDateTime, server_default=now())]
Hash = Annotated[str, mapped_column(String(64), comment="SHA-256, hexadecimal")]


class Base(DeclarativeBase):
    """Base of all tables; every constraint has a descriptive name."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {dict[str, Any]: Json, list[Any]: Json, float: Double()}


def words(enum: type[StrEnum], name: str) -> Enum:
    """A column type that stores an enum's values as text, with a CHECK constraint of that name."""
    return Enum(
        enum,
        name=name,
        native_enum=False,
        create_constraint=True,
        length=20,
        values_callable=lambda members: [member.value for member in members],
    )
