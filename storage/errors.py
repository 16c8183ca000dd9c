"""Everything that `storage` raises on purpose.

StorageError
+-- ConfigError (ValueError)     the user can fix it: a setting, a file, a column
|   +-- MissingColumn            the URL list or table lacks a named column
|   +-- EmptyInput               nothing to work on: an empty list, zero pairs, every URL dead
|   +-- EmptyTrainSet            the query of a training set gave no row
|   +-- QueryRefused             the SQL is not one reading statement
|   +-- SettingsChanged          a round was begun with other settings
|   +-- StaleOutput              a committed part was made from other inputs or settings
+-- LakeError                    the lake cannot be used as it is
|   +-- LakeNotFound
|   +-- SchemaVersionError       written by another version of the tables
|   +-- LakeBusy                 another run holds the lock
|   +-- PurgeUnfinished          a purge was begun and has to be finished first
|   +-- StorageFull
|   +-- NotWritable
|   +-- NoAccess                 an object store wants credentials, or other ones
+-- CorruptData                  bytes that are not what their manifest says
|   +-- CorruptPart
|   +-- CorruptShard
|   +-- PurgeNotClean            something of what was purged is still there
+-- IntakeError                  img2dataset gave up, even after restarts
+-- TransientError               worth another try as it is: the only thing that is retried
"""


class StorageError(Exception):
    """Base of all errors of this package."""


class ConfigError(StorageError, ValueError):
    """A setting or an input that the user can correct."""


class MissingColumn(ConfigError):
    """A named column is absent."""


class EmptyInput(ConfigError):
    """There is nothing to work on."""


class EmptyTrainSet(ConfigError):
    """The query of a training set gave no row."""


class QueryRefused(ConfigError):
    """The SQL is not a single reading statement, or it failed."""


class SettingsChanged(ConfigError):
    """A round was begun with other settings than those given now."""


class StaleOutput(ConfigError):
    """A committed part was made from other inputs or settings than those given now."""


class LakeError(StorageError):
    """The lake cannot be used as it is."""


class LakeNotFound(LakeError):
    """There is no lake at this address."""


class SchemaVersionError(LakeError):
    """The lake was written by another version of the tables."""


class LakeBusy(LakeError):
    """Another run holds the lake."""


class PurgeUnfinished(LakeError):
    """A purge of this lake was begun and not finished; nothing else may write until it is."""


class StorageFull(LakeError):
    """The disk (or quota) under the lake is full."""


class NotWritable(LakeError):
    """The lake, or a file in it, cannot be written."""


class NoAccess(LakeError):
    """An object store was asked without credentials, or with some that it refuses."""


class CorruptData(StorageError):
    """Stored bytes are not what was committed."""


class CorruptPart(CorruptData):
    """A Parquet part is absent, truncated or unreadable."""


class CorruptShard(CorruptData):
    """An image shard is absent, truncated or unreadable."""


class PurgeNotClean(CorruptData):
    """After a purge something of what it should have taken out is still there."""


class IntakeError(StorageError):
    """The download gave up."""


class TransientError(StorageError):
    """A failure that may pass by itself: a reset connection, a time-out of the store."""
