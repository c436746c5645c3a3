-- compatible_from: 2
-- The seal on all documents that owners applied. A process from before this step would change documents and not the
-- seal, and begin launches whose keys are not bound to what was frozen for them: such processes end first.

-- The index reads the whole audit log, and takes as long as that takes.
SET LOCAL statement_timeout TO 0;

CREATE TABLE document_seal (
  one INTEGER PRIMARY KEY CHECK (one = 1),
  tag BYTEA NOT NULL CHECK (length(tag) = 32)
);

-- The last record of a change of documents, without a look at any other record: the seal is bound to it.
CREATE INDEX audit_of_documents ON audit (number)
  WHERE event IN ('document.applied', 'document.deleted', 'documents.sealed');
