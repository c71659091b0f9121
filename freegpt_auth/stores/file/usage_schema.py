"""Tables and statements of the usage database in SQLite."""

TABLES = (
    """
    CREATE TABLE IF NOT EXISTS usage (
        token_id TEXT PRIMARY KEY, use_count INTEGER NOT NULL, last_used_at REAL NOT NULL
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE IF NOT EXISTS batches (
        process TEXT PRIMARY KEY, sequence INTEGER NOT NULL, written_at REAL NOT NULL
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE IF NOT EXISTS forgotten (token_id TEXT PRIMARY KEY, forgotten_at REAL NOT NULL) WITHOUT ROWID
    """,
)

ENTER = """
    INSERT INTO batches VALUES (?, ?, ?) ON CONFLICT (process) DO UPDATE SET
        sequence = excluded.sequence, written_at = excluded.written_at WHERE sequence < excluded.sequence
"""
# A use after the deletion belongs to a token that was restored: it counts.
ADD = """
    INSERT INTO usage SELECT * FROM (SELECT ? AS id, ? AS uses, ? AS latest)
        WHERE NOT EXISTS (SELECT 1 FROM forgotten WHERE token_id = id AND forgotten_at >= latest)
        ON CONFLICT (token_id) DO UPDATE SET
        use_count = use_count + excluded.use_count, last_used_at = max(last_used_at, excluded.last_used_at)
"""
RAISE = """
    INSERT INTO usage VALUES (?, ?, ?) ON CONFLICT (token_id) DO UPDATE SET
        use_count = max(use_count, excluded.use_count), last_used_at = max(last_used_at, excluded.last_used_at)
"""
FORGET = """
    INSERT INTO forgotten VALUES (?, ?) ON CONFLICT (token_id) DO UPDATE SET forgotten_at = excluded.forgotten_at
"""
EXPIRE = ("DELETE FROM batches WHERE written_at < ?", "DELETE FROM forgotten WHERE forgotten_at < ?")
